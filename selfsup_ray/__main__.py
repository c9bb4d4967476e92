"""The command `selfsup-ray`, also `python -m selfsup_ray`."""

from selfsup_ray.last_word import last_word


def main() -> int:
    """Run the command line; if the program is ended by force, that is said."""
    with last_word():
        from selfsup_ray import cli  # after the fork, which so stays small

        return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
