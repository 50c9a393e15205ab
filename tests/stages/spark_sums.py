"""Run as a process of its own, which takes the JVM with it: python spark_sums.py SQL FOLDER …; prints one JSON line.

For each folder of Parquet files its columns and the answer to the SQL over it, as the view `rows`.
"""

from __future__ import annotations

import json
import sys
import tempfile

from pyspark.sql import SparkSession


def main(sql: str, folders: list[str]) -> None:
    with tempfile.TemporaryDirectory() as home:
        builder = SparkSession.builder.master("local[1]").appName("malaria_ray tests")
        for name, value in {
            "spark.ui.enabled": "false",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.sql.shuffle.partitions": "1",
            "spark.sql.warehouse.dir": home,
        }.items():
            builder = builder.config(name, value)
        spark = builder.getOrCreate()
        found = []
        for folder in folders:
            rows = spark.read.parquet(folder)
            rows.createOrReplaceTempView("rows")
            answer = spark.sql(sql if "score" in rows.columns else "SELECT count(*) FROM rows").collect()[0]
            found.append({"columns": rows.columns, "answer": list(answer)})
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
