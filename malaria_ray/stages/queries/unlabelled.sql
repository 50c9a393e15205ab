-- How many images have no label or no patient, and of which folder.
SELECT results, regexp_replace(image_id, '[^/]*$', '') AS folder, count(*) AS n_images,
       count(*) FILTER (label IS NULL) AS n_without_label, count(*) FILTER (patient_id IS NULL) AS n_without_patient
FROM listing
GROUP BY results, folder
ORDER BY results, n_images DESC, folder;
