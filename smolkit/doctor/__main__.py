"""`python -m smolkit.doctor FILE...`"""

from smolkit.doctor.command import main
from smolkit.errors import run

if __name__ == "__main__":
    run(main)
