"""Container images: references, sources, manifests, layers."""
