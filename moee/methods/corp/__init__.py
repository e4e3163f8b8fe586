"""CORP, structured pruning of MLPs and heads in closed form: `method`; its parts: `budget`, `attention` and `convert`."""
