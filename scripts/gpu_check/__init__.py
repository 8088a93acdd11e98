"""The checks that scripts/gpu_check.sh runs; see there."""
