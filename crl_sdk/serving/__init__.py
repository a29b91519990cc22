"""The service: batcher and request path know no transport; service and server speak gRPC."""
