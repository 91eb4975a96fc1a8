"""Lets programs written for PyTorch Lightning run as they are."""
