"""Corrections: values of weights, biases and statistics that make up for what rounding breaks.

None changes the structure of a model, so that its weights still load into the user's own.
"""
