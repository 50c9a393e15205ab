-- The 100 images that a person should look at first, and why: cells in doubt, odd images, bad pictures.
SELECT results, rank, image_id, patient_id, score, predicted_label, array_to_string(reasons, ', ') AS reasons, value
FROM review
WHERE needs_review
ORDER BY rank, results
LIMIT 100;
