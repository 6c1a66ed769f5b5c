"""Start a server: `python launch.py`, or `python launch.py --model demo --port 0`; `--help` lists all settings."""

if __name__ == "__main__":
    from minisgl.serve import main

    raise SystemExit(main())
