"""The stages of the job as functions: a session, extraction, fine-tuning.

A spec and a source come in; a measured artifact goes out.
Imports parallel, store, models, data, calibrate, given, mlps, places, measure, train, methods and artifacts.
"""
