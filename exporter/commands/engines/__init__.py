"""Commands about exports: graphs, engines, bundles, and whether they are right and fast."""
