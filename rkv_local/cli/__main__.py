"""python -m rkv_local.cli"""

from rkv_local.cli import main

main()
