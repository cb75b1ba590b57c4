"""One HTML page with the plots of one or more training runs; `nspo2_trl/cli/report.py` has the code.

python scripts/report.py OUT [OUT2 ...] [-o PAGE.html] [--names NAME ...]
"""

from nspo2_trl.cli.report import main

if __name__ == "__main__":
    main()
