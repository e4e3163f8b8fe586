"""Commands about models: what is cut, how, and what is left."""
