"""Images that Python hands over.

Loaders, datasets and tensors come in; image sets go out.
Imports interface, libraries, models and data.
"""
