"""``python -m mvit_video.train`` is the command ``mvit-train``."""

from mvit_video.cli.main import train as main

if __name__ == "__main__":
    main()
