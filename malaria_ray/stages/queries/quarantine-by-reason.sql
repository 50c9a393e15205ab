-- Files that could not be used, by reason, with one of each for a look.
SELECT results, stage, reason, count(*) AS n_files, sum(n_bytes) AS n_bytes, min(image_id) AS example,
       arg_min(detail, image_id) AS detail
FROM quarantine
GROUP BY results, stage, reason
ORDER BY results, n_files DESC, reason;
