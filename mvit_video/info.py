"""``python -m mvit_video.info`` is the command ``mvit-info``."""

from mvit_video.cli.main import info as main

if __name__ == "__main__":
    main()
