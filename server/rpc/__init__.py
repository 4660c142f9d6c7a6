"""The transport: gRPC servers, the chain around every call. It knows no domain."""
