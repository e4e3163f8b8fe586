"""Where a result may go, and what an interrupted run left.

Paths come in; checked places and states go out.
Imports store and data.
"""
