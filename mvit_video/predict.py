"""``python -m mvit_video.predict`` is the command ``mvit-predict``."""

from mvit_video.cli.main import predict as main

if __name__ == "__main__":
    main()
