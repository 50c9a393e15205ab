-- Needs several results. Images that the first and another give different calls, the furthest apart first.
SELECT other.results, first.image_id,
       coalesce(first.patient_id, other.patient_id) AS patient_id, coalesce(first.label, other.label) AS label,
       first.score AS first_score, other.score AS other_score, abs(first.score - other.score) AS difference
FROM predictions AS first
JOIN runs ON runs.results = first.results AND runs.number = 1
JOIN predictions AS other ON other.image_id = first.image_id AND other.results <> first.results
    AND other.content_digest IS NOT DISTINCT FROM first.content_digest
WHERE first.predicted_label <> other.predicted_label
ORDER BY difference DESC, first.image_id, other.results
LIMIT 100;
