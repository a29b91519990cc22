"""Scripts that run in the peers' own environments; they import nothing of crl but crl's own."""
