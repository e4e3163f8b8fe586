"""Planning: what wins on a given model, data and device.

Imports layers, store, models, data, calibrate, mlps, places, measure, methods and stages.
"""
