"""``python -m mvit_video.export`` is the command ``mvit-export``."""

from mvit_video.cli.main import export as main

if __name__ == "__main__":
    main()
