"""What each kind of layer is outside PyTorch; `registry` lists them.

A layer and a graph come in; results, problems and times go out.
Imports moee, plugins and passes.
"""
