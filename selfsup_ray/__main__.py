"""`python -m selfsup_ray` is `selfsup-ray`."""

from selfsup_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
