"""Model repositories of NVIDIA's Triton Inference Server (not of the kernel language Triton)."""
