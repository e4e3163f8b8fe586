"""What is done to a mixture that exists: experts that are alike are merged, and those that a domain does not need are dropped.

Imports layers, parallel, space, store, models, data and calibrate.
"""
