"""Workers: they lease jobs over gRPC, do them, and settle. No SQL, no credentials of stores."""
