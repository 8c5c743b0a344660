#!/bin/sh
# Runs a compiler, and fails where ptxas says that it serialized wgmma instructions (remarks C7510, C7514 and their kin).
output=$("$@" 2>&1)
status=$?
[ -z "$output" ] || printf '%s\n' "$output" >&2
case $output in
*wgmma*serializ* | *C7510* | *C7514*)
  echo "error: ptxas serialized wgmma instructions, which makes products slow. Use a newer nvcc (CUDACXX)," \
    "no -G among its options, or JAX_TSQ_CPU_ONLY=1." >&2
  exit 1
  ;;
esac
exit $status
