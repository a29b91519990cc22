"""Export of open_clip models to bundles, and the demo model. Imported as `crl_export`."""
