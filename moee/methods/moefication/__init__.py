"""MoEfication: `method` is the method among others, `split` divides a layer's neurons into experts."""
