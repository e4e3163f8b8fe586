"""Narrower attention heads, as a method among others: `method`; its parts: `narrowing`, `widths` and `fit`."""
