"""Images that Python hands over.

Loaders, datasets and tensors come in; image sets go out.
Imports data, models, libraries and store.
"""
