"""Training: the Lightning module that prunes, distils and quantizes while it trains."""
