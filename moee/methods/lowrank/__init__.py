"""Low-rank maps in the place of an MLP's two: `method`, its `options`, `convert` by CLEAR-MoE's decomposition."""
