"""Operators of FusionTrain, one folder each. `reference.py` is the specification of an operator."""
