-- Loss and accuracy by epoch of the run that gave the scores.
SELECT results, epoch, train_loss, val_loss, train_accuracy, val_accuracy, val_roc_auc,
       val_loss = min(val_loss) OVER (PARTITION BY results) AS is_lowest_loss
FROM history
ORDER BY results, epoch;
