-- Bytes that stand under several names, and whether their labels agree.
SELECT results, content_digest, count(*) AS n_copies, count(DISTINCT label) <= 1 AS labels_agree,
       count(DISTINCT patient_id) AS n_patients, min(image_id) AS first_image, max(image_id) AS last_image
FROM predictions
WHERE content_digest IS NOT NULL
GROUP BY results, content_digest
HAVING count(*) > 1
ORDER BY results, n_copies DESC, content_digest;
