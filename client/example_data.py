"""Two small data files for a first run, tweets.csv and reviews.csv,
from the rated sentences that `fedtune fetch
vader-icwsm-2014` brings:  python client/example_data.py FOLDER
"""

import csv
import sys
from pathlib import Path

from fedtune.data import vader
from fedtune.packages import find

COLUMNS = ("text", "label", "document")
ROWS = 1000

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
table = vader.read(find("vader-icwsm-2014"))
rows = list(zip(table.columns["domain"], *(table.columns[name] for name in COLUMNS)))
for domain, name in (("tweets", "tweets.csv"), ("amazon", "reviews.csv")):
    mine = [row[1:] for row in rows if row[0] == domain][:ROWS]
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(mine)
    print(f"{folder / name}: {len(mine)} texts")
