-- Cells called parasitized, by patient and split, the highest share first. It is no parasitaemia.
SELECT results, split, patient_id, label, n_cells, n_parasitized, parasitized_fraction
FROM patients
ORDER BY results, list_position(['test', 'unseen', 'val', 'train'], split), parasitized_fraction DESC, patient_id;
