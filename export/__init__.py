"""Offline tools, importable as `crl_export`: open_clip models to bundles, and the demo model."""
