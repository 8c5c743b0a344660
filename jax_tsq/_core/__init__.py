"""What all operations share: primitives, meshes, native code, numerics, checks."""
