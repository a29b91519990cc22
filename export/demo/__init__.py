"""The demo world and the small CLIP trained on it; import the submodules you need."""
