"""What every part writes and reads: files, tables on the terminal, fingerprints."""
