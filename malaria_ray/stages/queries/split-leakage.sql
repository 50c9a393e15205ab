-- What stands in several splits of the run: patients (expected where it was split by image) and identical images.
SELECT results, 'patient' AS what, patient_id AS id, list_sort(list(DISTINCT split)) AS splits, count(*) AS n_images
FROM splits WHERE patient_id IS NOT NULL GROUP BY results, patient_id HAVING count(DISTINCT split) > 1
UNION ALL
SELECT results, 'content', content_digest, list_sort(list(DISTINCT split)), count(*)
FROM splits WHERE content_digest IS NOT NULL GROUP BY results, content_digest HAVING count(DISTINCT split) > 1
ORDER BY results, what, id;
