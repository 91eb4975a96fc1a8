"""The loops: fit.py, step.py, evaluate.py, and session.py around them."""
