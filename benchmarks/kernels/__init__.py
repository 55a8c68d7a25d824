"""Static estimates of TPU kernels, from the schedule libtpu writes for a chip that need not be there."""
