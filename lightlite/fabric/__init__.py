"""Your own loop, on the Trainer's plugins and launchers."""
