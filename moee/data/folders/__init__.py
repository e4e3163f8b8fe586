"""Image folders: which images there are, and of which class.

A class is a folder right below the split, as torchvision's `ImageFolder` has it; what lies deeper belongs to it. Links are
followed, but a real folder is visited once and a link that leads back up never, so loops end; a real file is never in both
splits. Images beside the class folders have no class. Hidden folders are no classes.
"""
