"""The stages of the job as functions: a session, extraction, fine-tuning.

A spec and a source come in; a measured artifact goes out.
Imports interface, layers, parallel, space, store, libraries, models, data, calibrate, given, mlps, places, measure, train,
methods, artifacts and shrinking.
"""
